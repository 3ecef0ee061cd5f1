"""What arrived of an adapter, measured without labels."""
