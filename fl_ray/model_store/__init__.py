"""Trained models that machines share: published once, found by their key, checked on the way back."""
