"""The folder to which nnUNet_extTrainer points; nnU-Net imports the other file in it."""
