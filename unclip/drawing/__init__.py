"""Ways to make pictures with a trained cascade, one file a mode; `model.UnCLIP` has them all."""
