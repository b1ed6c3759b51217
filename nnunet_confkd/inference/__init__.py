"""What a trained model is used for: prediction, uncertainty, completion, export."""
