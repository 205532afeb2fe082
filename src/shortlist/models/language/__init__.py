"""Language-model training, alignment, adapters, memory."""
