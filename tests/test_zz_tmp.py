def test_import_torch():
    import torch
def test_import_diffusers():
    import diffusers
    diffusers.DiTTransformer2DModel, diffusers.DDIMScheduler, diffusers.DiTPipeline
def test_save_load(tmp_path):
    import diffusers, torch
    m=diffusers.DiTTransformer2DModel(num_attention_heads=2,attention_head_dim=8,in_channels=1,num_layers=2,sample_size=8,patch_size=2,num_embeds_ada_norm=11,norm_num_groups=1)
    m.save_pretrained(tmp_path, safe_serialization=True)
    m=diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)
    m.eval()
    with torch.no_grad(): m(torch.randn(2,1,8,8),timestep=torch.tensor([3,3]),class_labels=torch.tensor([1,2]))
def test_export(tmp_path):
    import torch
    class M(torch.nn.Module):
        def __init__(s):
            super().__init__(); s.l=torch.nn.Linear(4,4)
        def forward(s,x): return torch.nn.functional.scaled_dot_product_attention(s.l(x),x,x)
    p=torch.onnx.export(M(),(torch.randn(2,3,4),),dynamo=True,opset_version=20,dynamic_shapes=({0:torch.export.Dim("batch")},),verbose=False)
    p.save(str(tmp_path/"x.onnx"))
    import onnxruntime
    onnxruntime.InferenceSession(str(tmp_path/"x.onnx"))
def test_sched():
    import diffusers
    for n in ("DDIMScheduler","DPMSolverMultistepScheduler","EulerDiscreteScheduler","FlowMatchEulerDiscreteScheduler"):
        s=getattr(diffusers,n)(); s.set_timesteps(10)
def test_sk():
    import sklearn.datasets; sklearn.datasets.load_digits()
def test_mpl():
    import matplotlib.pyplot
def test_ir():
    import onnx_ir, onnxscript, onnx
