"""From an artifact to an inference server: laying out its models, what runs inside it, and checking one that runs."""
