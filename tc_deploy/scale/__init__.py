"""Many machines: rows of a file to pictures, by one engine or by many through Ray; replicas in Ray Serve."""
