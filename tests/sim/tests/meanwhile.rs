//! What another CPU does while one waits until all have flushed.

use sim::world::meanwhile;

#[test]
fn a_use_that_ends_during_a_flush_is_flushed_again() {
    meanwhile::a_use_that_ends_during_a_flush();
}

#[test]
fn a_list_that_becomes_a_table_during_a_flush_is_not_written() {
    meanwhile::a_list_that_becomes_a_table_during_a_flush();
}

#[test]
fn a_domain_that_dies_during_a_flush_stays_until_the_step_ends() {
    meanwhile::a_domain_that_dies_during_a_flush();
}
