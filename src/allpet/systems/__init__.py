"""LightningModules: the training recipes of stage 1 and stage 2."""
