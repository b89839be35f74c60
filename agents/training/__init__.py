"""Fine-tuning: TRL's trainers on a DeepSpeed engine, in ranks that Ray Train starts. Only `ray_entry` and `job` know Ray."""
