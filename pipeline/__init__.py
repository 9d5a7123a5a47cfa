"""What a model is and what happens to it: contracts, stages and the order of the stages."""
