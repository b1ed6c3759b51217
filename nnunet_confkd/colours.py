"""The colours of classes and branches in pictures."""
# the colours of Okabe and Ito, which colour-blind readers can tell apart
COLOURS = ("#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#F0E442", "#D55E00", "#0072B2")
# "given": predictions that another program has made
BRANCH_COLOURS = {"student": "#0b5fa5", "teacher": "#b04a00", "given": "#6a4c93"}
