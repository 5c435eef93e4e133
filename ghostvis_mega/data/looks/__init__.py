"""Looking at data: how it packs, how it spreads over ranks, and pages that show both."""
