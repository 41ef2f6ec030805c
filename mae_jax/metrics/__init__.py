"""What a run reports: numbers and images (writer), a progress bar (progress), curves (figure)."""
