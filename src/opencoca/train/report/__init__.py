"""What a run writes about itself: metrics, live view, reports."""
