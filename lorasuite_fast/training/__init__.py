"""The light trainings: refinement from the old model, and fine-tuning on samples."""
