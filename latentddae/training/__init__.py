"""The DeepSpeed engine, the weight average, the resume state and the
signals that interrupt a run."""
