"""The colours of classes in pictures."""
# the colours of Okabe and Ito, which colour-blind readers can distinguish
COLOURS = ("#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#F0E442", "#D55E00", "#0072B2")
