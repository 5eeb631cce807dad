//! Calls that went wrong once, told as stories.

use hypercall_abi::vcpu::{RegisterVcpuInfo, VcpuOp};
use hypercall_abi::{Errno, Hypercall};
use sim::world::script::tell;

/// A record moved to the page it was in held a use that nobody dropped: the page was lost with its domain (P2, P11).
#[test]
fn a_vcpu_record_does_not_move_to_where_it_is() {
    tell(200, |stage| {
        let guest = stage.enter(false);
        let mfn = stage.domain(&guest).shared_info().expect("it has one").number();
        let arg = stage.put(&guest, 0, &RegisterVcpuInfo { mfn, offset: 512, reserved: 0 });
        let went = stage.call(&guest, Hypercall::VcpuOp, &[VcpuOp::RegisterVcpuInfo.number(), 0, arg]);
        assert_eq!(went.result, Err(Errno::Acces));
    });
}
