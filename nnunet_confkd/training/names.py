"""Names of the branches, and of what is written into the folder of a fold."""

BRANCHES = ("student", "teacher", "mean")  # that can predict; mean: of the logits
CHECKPOINT = "checkpoint_final.pth"  # of a training that has ended
TEACHER_CHECKPOINT = "checkpoint_teacher.pth"  # of a training with a second stage, before it begins
COMPLETED_LABELS = "completed_labels"  # the folder of the labels that the teacher has completed
VALIDATION_FOLDERS = {"student": "validation", "teacher": "validation_teacher"}  # in the folder of a fold
