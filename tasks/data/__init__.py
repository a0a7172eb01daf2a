"""What the families of tasks share: downloads, images, labelled data sets, random numbers."""
