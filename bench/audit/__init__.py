"""Wrong labels found by gradient norms, against loss, confidence, EL2N and cleanlab."""
