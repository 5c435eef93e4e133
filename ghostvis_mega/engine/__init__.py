"""One optimizer step over all ranks: schedule, gradient finishing, ZeRO, norm, clip."""
