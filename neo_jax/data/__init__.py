"""Data, from sources of text to batches: see `pipeline.build`."""
