"""What a run costs on a TPU pod and whether it fits, from the compiler alone: `docs/plan.md`."""
