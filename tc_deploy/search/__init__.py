"""Plans that earn their place: search on measured latency and quality, with the baselines in the same run."""
