"""What both executors stand on: the connection to Ray, placement, pools of actors, losses."""
