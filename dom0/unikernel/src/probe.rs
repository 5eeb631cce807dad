//! Running arbitrary code and catching what becomes of it: for guests whose purpose is to test the hypervisor.
