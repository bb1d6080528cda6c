"""What differs from pre-training where a trained model learns something more."""
