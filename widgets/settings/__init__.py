"""The settings of a panel: a control for each field, and the groups that the less used ones stand in."""
