_base_ = ["./streampetr_r50_704x256_428q.py"]

model = dict(pts_bbox_head=dict(num_query=644, num_propagated=256, memory_len=1024, topk_proposals=256))
