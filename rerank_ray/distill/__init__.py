"""From soft labels to a student: data order, sampling, objective, training loop and checkpoints. No Ray in here."""
