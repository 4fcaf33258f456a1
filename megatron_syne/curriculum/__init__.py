"""What changes the mixture while a run goes on: ``reweighting`` of topics by their validation perplexity."""
