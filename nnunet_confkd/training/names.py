"""Names of the branches, and of the folders of their validation."""

BRANCHES = ("student", "teacher", "mean")  # that can predict; mean: of the logits
TEACHER_CHECKPOINT = "checkpoint_teacher.pth"  # of a training with a second stage, before it begins
VALIDATION_FOLDERS = {"student": "validation", "teacher": "validation_teacher"}  # in the folder of a fold
