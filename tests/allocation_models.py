"""A block to allocate by hand: five weights, two of which read the same value."""

MODEL = """
module @block {
  weight @embed : f32[256,64] = sha256:aa {role = "table", scores = {w4g64 = 0.5, w8g64 = 0.01}}
  weight @q : f32[64,64] = sha256:bb {role = "block", scores = {w2g64 = 9.0, w4g64 = 0.5, w8g64 = 0.1}}
  weight @k : f32[32,64] = sha256:cc {role = "block", scores = {w2g64 = 1.0, w4g64 = 0.25, w8g64 = 0.1}}
  weight @up : f32[128,64] = sha256:dd {role = "block", scores = {w2g64 = 2.0, w3g64 = 0.7, w4g64 = 0.3}}
  weight @down : f32[64,128] = sha256:ee {role = "block", scores = {w2g64 = 1.5, w3g64 = 0.6, w4g64 = 0.2}}
  weight @norm : f32[64] = sha256:ff
  func @forward(%ids: i64[batch,seq]) {
    %0 = embedding %ids, @embed : f32[batch,seq,64]
    %1 = rms_norm %0, @norm {eps = 1e-5} : f32[batch,seq,64]
    %2 = linear %1, @q : f32[batch,seq,64]
    %3 = linear %1, @k : f32[batch,seq,32]
    %4 = linear %2, @up : f32[batch,seq,128]
    %5 = linear %4, @down : f32[batch,seq,64]
    %6 = linear %5, @embed : f32[batch,seq,256]
    return logits = %6, keys = %3
  }
}
"""
