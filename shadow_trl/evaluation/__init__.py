"""What a model scores, and how models compare."""
