"""Learn, apply, score and show: liver and liver-tumour segmentation from cached tensors."""
