"""Documents into pairs of segments, for next-sentence prediction."""
