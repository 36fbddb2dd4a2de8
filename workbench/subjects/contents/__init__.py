"""What a checkpoint holds, compared with what its class needs."""
