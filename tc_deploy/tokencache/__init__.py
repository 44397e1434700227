"""TokenCache in PyTorch: cached forward, Cache Predictor, selection of tokens and blocks, a reference sampler."""
