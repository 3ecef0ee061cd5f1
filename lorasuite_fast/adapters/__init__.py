"""adapter adapter_config adapter_folder peft_check factors aligned_states base_match fill"""
