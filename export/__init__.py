"""Export a trained run to SavedModel, TFLite and TF-TRT, and predict with any of them.

Every exported model takes uint8 pixels and contains its normalisation and class names.
"""
