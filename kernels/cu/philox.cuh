// Philox4x32-10 (Salmon et al., SC 2011), a generator without a state: four random words for a counter and a 64-bit key.

// Counters side by side, so that they share the keys of the rounds.
template <int COUNT> DEVICE void philox(uint4 (&counters)[COUNT], u64 key) {
    u32 k0 = (u32)key, k1 = (u32)(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const uint4 c = counters[i];
            const u64 a = (u64)c.x * 0xD2511F53u, b = (u64)c.z * 0xCD9E8D57u;
            counters[i] = make_uint4((u32)(b >> 32) ^ c.y ^ k0, (u32)b, (u32)(a >> 32) ^ c.w ^ k1, (u32)a);
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}
