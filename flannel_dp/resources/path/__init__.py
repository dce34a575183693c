"""What of other programs diverts packets of pods; reads only."""
