"""A local stack: Ray and the coordinator as processes of this machine."""
