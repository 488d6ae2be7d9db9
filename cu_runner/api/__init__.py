"""Five lines of Python: load a model, unlearn concepts, look at the images, save it for others."""
