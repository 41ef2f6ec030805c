"""Reports of a run: numbers and images (writer), a progress bar (progress), curves (figure)."""
