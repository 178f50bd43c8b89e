@T.prim_func(s_tir=True)
def attention_rows(q_h: T.handle("float32"), k_h: T.handle("float32"), v_h: T.handle("float32"), y_h: T.handle("float32"), scale_h: T.handle("float32"), mask_h: T.handle("float32"), B: T.int64, H: T.int64, S: T.int64, Sk: T.int64, group: T.int64, q_batch: T.int64, q_head: T.int64, q_token: T.int64, k_batch: T.int64, k_head: T.int64, k_token: T.int64, v_batch: T.int64, v_head: T.int64, v_token: T.int64, m_batch: T.int64, m_head: T.int64, m_row: T.int64):
    T.func_attr({"tirx.noalias": True, "global_symbol": "attention_rows"})
    q = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=q_h, align=4)
    k = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=k_h, align=4)
    v = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=v_h, align=4)
    y = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=y_h, align=4)
    scale = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=scale_h, align=4)
    mask = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=mask_h, align=4)
    T.attr(T.int32(0), "device_id", 0)
    T.attr(T.int32(0), "device_type", 1)
    rows_at = T.alloc_buffer((1,), "int64", scope="global")
    rows_at[0] = B * S * H
    rows: T.let = rows_at[0]
    parts_at = T.alloc_buffer((1,), "int64", scope="global")
    parts_at[0] = T.if_then_else(rows * Sk * 6 > 32768, rows, T.int64(1))
    parts: T.let = parts_at[0]
    for part in T.parallel(parts):
        begin_at = T.alloc_buffer((1,), "int64", scope="global")
        begin_at[0] = part * rows // parts
        begin: T.let = begin_at[0]
        for i in range((part + 1) * rows // parts - begin):
            row_at = T.alloc_buffer((1,), "int64", scope="global")
            row_at[0] = begin + i
            row: T.let = row_at[0]
            batch_at = T.alloc_buffer((1,), "int64", scope="global")
            batch_at[0] = row // H // S
            batch: T.let = batch_at[0]
            token_at = T.alloc_buffer((1,), "int64", scope="global")
            token_at[0] = row // H % S
            token: T.let = token_at[0]
            head_at = T.alloc_buffer((1,), "int64", scope="global")
            head_at[0] = row % H
            head: T.let = head_at[0]
            qt_at = T.alloc_buffer((1,), "int64", scope="global")
            qt_at[0] = batch * q_batch + head * q_head + token * q_token
            qt: T.let = qt_at[0]
            kt_at = T.alloc_buffer((1,), "int64", scope="global")
            kt_at[0] = batch * k_batch + head // group * k_head
            kt: T.let = kt_at[0]
            vt_at = T.alloc_buffer((1,), "int64", scope="global")
            vt_at[0] = batch * v_batch + head // group * v_head
            vt: T.let = vt_at[0]
            mt_at = T.alloc_buffer((1,), "int64", scope="global")
            mt_at[0] = batch * m_batch + head * m_head + token * m_row
            mt: T.let = mt_at[0]
            seen_at = T.alloc_buffer((1,), "int64", scope="global")
            seen_at[0] = Sk
            seen: T.let = seen_at[0]
            q1 = T.alloc_buffer((6,), "float32", scope="global")
            out = T.alloc_buffer((6,), "float32", scope="global")
            p = T.alloc_buffer((64,), "float32", scope="global")
            top = T.alloc_buffer((1,), "float32", scope="global")
            sum = T.alloc_buffer((1,), "float32", scope="global")
            fade = T.alloc_buffer((1,), "float32", scope="global")
            q1[T.ramp(0, 1, 4)] = q[T.ramp(qt + 0, 1, 4)] * T.broadcast(scale[0], 4)
            out[T.ramp(0, 1, 4)] = T.broadcast(T.float32(0), 4)
            q1[T.ramp(4, 1, 2)] = q[T.ramp(qt + 4, 1, 2)] * T.broadcast(scale[0], 2)
            out[T.ramp(4, 1, 2)] = T.broadcast(T.float32(0), 2)
            top[0] = T.float32("-inf")
            sum[0] = T.float32(0)
            for block in range((seen + 63) // 64):
                key_at = T.alloc_buffer((1,), "int64", scope="global")
                key_at[0] = block * 64
                key: T.let = key_at[0]
                count_at = T.alloc_buffer((1,), "int64", scope="global")
                count_at[0] = T.min(seen - key, T.int64(64))
                count: T.let = count_at[0]
                fade[0] = top[0]
                for j in range(count):
                    dot_1: T.let = q1[T.ramp(0, 1, 4)] * k[T.ramp(kt + (key + j) * k_token + 0, 1, 4)]
                    dot_2: T.let = q1[T.ramp(4, 1, 2)] * k[T.ramp(kt + (key + j) * k_token + 4, 1, 2)]
                    half_3: T.let = dot_1
                    half_4: T.let = T.Shuffle([half_3], [0, 1]) + T.Shuffle([half_3], [2, 3])
                    half_5: T.let = dot_2
                    score_6: T.let = T.Shuffle([half_4], [0]) + T.Shuffle([half_4], [1]) + T.Shuffle([half_5], [0]) + T.Shuffle([half_5], [1]) + mask[mt + key + j]
                    p[j] = score_6
                    top[0] = T.max(top[0], score_6)
                for j in range((count + 3) // 4 * 4 - count):
                    p[count + j] = T.float32("-inf")
                highest_7: T.let = T.if_then_else(top[0] == T.float32("-inf"), T.float32(0), top[0])
                v_8: T.let = T.broadcast(fade[0] - highest_7, 4)
                sum_9: T.let = T.call_llvm_pure_intrin("float32x4", "llvm.fmuladd", v_8, T.broadcast(T.float32(1.4426950408889634), 4), T.broadcast(T.float32(12583039.0), 4))
                r_10: T.let = T.call_llvm_pure_intrin("float32x4", "llvm.fmuladd", v_8, T.broadcast(T.float32(1.4426950408889634), 4), (T.broadcast(T.float32(0.0), 4) - (sum_9 - T.broadcast(T.float32(12583039.0), 4))))
                p_11: T.let = T.broadcast(T.float32(0.0013264728477224708), 4) * r_10 + T.broadcast(T.float32(0.009671513922512531), 4)
                p_12: T.let = p_11 * r_10 + T.broadcast(T.float32(0.05550733581185341), 4)
                p_13: T.let = p_12 * r_10 + T.broadcast(T.float32(0.24022242426872253), 4)
                p_14: T.let = p_13 * r_10 + T.broadcast(T.float32(0.6931470036506653), 4)
                p_15: T.let = p_14 * r_10 + T.broadcast(T.float32(1.0), 4)
                power_16: T.let = T.reinterpret("float32x4", T.shift_left(T.reinterpret("int32x4", sum_9), T.broadcast(T.int32(23), 4)))
                exp_17: T.let = p_15 * power_16
                p_18: T.let = T.Select(v_8 < T.broadcast(T.float32(-87.0), 4), T.broadcast(T.float32(0.0), 4), exp_17)
                fades = T.alloc_buffer((4,), "float32", scope="global")
                fades[T.ramp(0, 1, 4)] = p_18
                fade[0] = fades[0]
                sum[0] = sum[0] * fade[0]
                for j in range((count + 3) // 4):
                    v_19: T.let = p[T.ramp(j * 4, 1, 4)] - T.broadcast(highest_7, 4)
                    sum_20: T.let = T.call_llvm_pure_intrin("float32x4", "llvm.fmuladd", v_19, T.broadcast(T.float32(1.4426950408889634), 4), T.broadcast(T.float32(12583039.0), 4))
                    r_21: T.let = T.call_llvm_pure_intrin("float32x4", "llvm.fmuladd", v_19, T.broadcast(T.float32(1.4426950408889634), 4), (T.broadcast(T.float32(0.0), 4) - (sum_20 - T.broadcast(T.float32(12583039.0), 4))))
                    p_22: T.let = T.broadcast(T.float32(0.0013264728477224708), 4) * r_21 + T.broadcast(T.float32(0.009671513922512531), 4)
                    p_23: T.let = p_22 * r_21 + T.broadcast(T.float32(0.05550733581185341), 4)
                    p_24: T.let = p_23 * r_21 + T.broadcast(T.float32(0.24022242426872253), 4)
                    p_25: T.let = p_24 * r_21 + T.broadcast(T.float32(0.6931470036506653), 4)
                    p_26: T.let = p_25 * r_21 + T.broadcast(T.float32(1.0), 4)
                    power_27: T.let = T.reinterpret("float32x4", T.shift_left(T.reinterpret("int32x4", sum_20), T.broadcast(T.int32(23), 4)))
                    exp_28: T.let = p_26 * power_27
                    p_29: T.let = T.Select(v_19 < T.broadcast(T.float32(-87.0), 4), T.broadcast(T.float32(0.0), 4), exp_28)
                    p[T.ramp(j * 4, 1, 4)] = p_29
                    half_30: T.let = p_29
                    half_31: T.let = T.Shuffle([half_30], [0, 1]) + T.Shuffle([half_30], [2, 3])
                    sum[0] = sum[0] + T.Shuffle([half_31], [0]) + T.Shuffle([half_31], [1])
                out[T.ramp(0, 1, 4)] = out[T.ramp(0, 1, 4)] * T.broadcast(fade[0], 4)
                out[T.ramp(4, 1, 2)] = out[T.ramp(4, 1, 2)] * T.broadcast(fade[0], 2)
                for j in range(count):
                    out[T.ramp(0, 1, 4)] = out[T.ramp(0, 1, 4)] + T.broadcast(p[j], 4) * v[T.ramp(vt + (key + j) * v_token + 0, 1, 4)]
                    out[T.ramp(4, 1, 2)] = out[T.ramp(4, 1, 2)] + T.broadcast(p[j], 2) * v[T.ramp(vt + (key + j) * v_token + 4, 1, 2)]
            share_32: T.let = T.if_then_else(sum[0] == T.float32(0), T.float32(0), T.float32(1) / sum[0])
            y[T.ramp(row * 6 + 0, 1, 4)] = out[T.ramp(0, 1, 4)] * T.broadcast(share_32, 4)
            y[T.ramp(row * 6 + 4, 1, 2)] = out[T.ramp(4, 1, 2)] * T.broadcast(share_32, 2)
