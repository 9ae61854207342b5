"""The recall-distortion study: what does pruning do to the recall of each class?"""
