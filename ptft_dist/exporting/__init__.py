"""Trained models as directories: the weights of a checkpoint, an adapter folded into its base."""
