"""Names of the branches, and of the folders of their validation."""

BRANCHES = ("student", "teacher", "mean")  # that can predict; mean: of the logits
VALIDATION_FOLDERS = {"student": "validation", "teacher": "validation_teacher"}  # in the folder of a fold
