"""pretrained text_config checkpoint families loader hidden_states vocabulary loading products token_ends unembedding"""
