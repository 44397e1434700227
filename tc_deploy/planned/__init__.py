"""What a plan says as live objects: its checkpoint, its sampler, its prompts."""
